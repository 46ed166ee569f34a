"""Finding cheaper settings for one model: calibration, searches, their commands."""
