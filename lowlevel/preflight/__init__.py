"""The checks of `lowlevel doctor` (libraries, device, kernels, disk, one step) and the forecast of `lowlevel plan`."""
