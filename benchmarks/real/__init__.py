"""Experiments on a real pre-trained model, SmolLM2-135M-Instruct: what a stranger is asked to believe."""
