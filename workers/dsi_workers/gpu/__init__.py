"""What runs on a CUDA device alone: kernels of our own, and forwards recorded as graphs."""
