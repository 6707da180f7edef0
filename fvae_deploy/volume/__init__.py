"""Volumes on disk, read and written as frames along z: NIfTI, DICOM series, Zarr arrays.

A volume is an array (x, y, z) as nibabel gives it, in Hounsfield units (HU). It is passed on in
slabs: consecutive frames `[t, x, y]`, so a frame's height is x and its width is y. Slabs are
int16 where the file's values are whole numbers that fit, float32 otherwise.

    open.open_volume(path)   -> base.Reader    chosen by suffix or by what the folder holds
    open.create_volume(path) -> base.Writer    chosen by suffix

Nothing here knows about tiles, engines or models.
"""
