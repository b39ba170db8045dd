"""Plans that are measured, on tensors without memory. All files here import torch, and the others import them late."""
