"""Volumes on disk, read and written as frames along z: NIfTI, DICOM series, Zarr arrays.

A volume is an array (x, y, z) with the axis order of nibabel, in Hounsfield units (HU). It is
read and written in slabs of consecutive frames `[t, x, y]`: a frame's height is x, its width y.
Slabs are int16 if the file's values are whole numbers that fit into int16, float32 otherwise.

    open.open_volume(path)   -> base.Reader    chosen by suffix, or by the contents of the folder
    open.create_volume(path) -> base.Writer    chosen by suffix

This package does not depend on tiles, engines or models.
"""
