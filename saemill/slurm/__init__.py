"""A pipeline as SLURM jobs: written as scripts, submitted with dependencies, followed to the end."""
