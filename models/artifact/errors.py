"""The error of an artifact that is missing, damaged, or does not do what it says."""


class ArtifactError(ValueError):
    """An artifact that is missing, damaged, or does not do what it says; the message names the file."""
