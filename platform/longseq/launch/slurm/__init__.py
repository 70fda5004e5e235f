"""Jobs on a SLURM cluster: scripts, submission, what runs in the job, and how it goes. No torch but in the job."""
