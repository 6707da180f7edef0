"""A synthetic CT of the torso, drawn slice by slice, and random variations of its patient."""
