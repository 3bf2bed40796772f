"""Train CIFAR ResNets under Accelerate, on one or many devices."""
