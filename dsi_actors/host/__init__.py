"""What this machine has: devices, installed packages, temporary directories, standard streams."""
