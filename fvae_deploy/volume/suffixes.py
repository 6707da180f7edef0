"""File extensions of volumes, in lower case; those in upper case mean the same."""

NIFTI = (".nii.gz", ".nii", ".nii.bgz", ".hdr", ".hdr.gz", ".img", ".img.gz")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
FILES = (*NIFTI, *ITK)
OUTPUTS = (".nii.gz", ".nii", ".nrrd", ".mha", ".zarr", ".dcm")
