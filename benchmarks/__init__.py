"""Side-by-side runs against other software. Ratios within one run matter; figures differ between machines."""
