"""What makes docs/pictures: ``make pictures``."""
