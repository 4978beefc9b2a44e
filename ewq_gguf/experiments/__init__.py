"""What is compared: plans, presets, controls, the paper."""
