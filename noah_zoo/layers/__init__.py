"""The head as a module, its operator and kernels, and the heads that it is compared with."""
