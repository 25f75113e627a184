"""Measure, raise and steer the visual attention of vision-language models, as PyTorch Lightning modules."""
