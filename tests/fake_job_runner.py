"""The program `bench.job_runner` with workers that measure nothing (see fake_worker)."""

import functools
import sys

from fake_bench import fake_argv

from bench import job_runner, launchers

if __name__ == "__main__":
    launch = functools.partial(launchers.launch, argv_for=fake_argv, grace=0.5)
    job_runner.run = functools.partial(job_runner.run, launch=launch)
    sys.exit(job_runner.main(sys.argv[1:]))
