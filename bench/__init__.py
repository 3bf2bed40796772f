"""Measure what CIFAR ResNet configurations cost and reach, and compare them."""
