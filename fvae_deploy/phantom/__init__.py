"""A synthetic torso, drawn slab by slab, and other patients of it."""
