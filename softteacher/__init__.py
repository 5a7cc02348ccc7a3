"""Soft Teacher: semi-supervised object detection from a COCO data set to a served detector."""

__version__ = "0.1.0"
