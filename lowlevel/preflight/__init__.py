"""What `lowlevel doctor` looks at: libraries, device, kernels, disk, and one step of the built-in base."""
