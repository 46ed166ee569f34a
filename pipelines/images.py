"""The image reader, for pipelines: `pilotage.guidance.images`, where the denoisers need it too."""

from ..guidance.images import SUFFIXES, check_depth, image_files, read_image, to_tensor

__all__ = ["SUFFIXES", "check_depth", "image_files", "read_image", "to_tensor"]
