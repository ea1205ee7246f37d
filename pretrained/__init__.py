"""Released models; `digits` is small enough to come with the package."""
