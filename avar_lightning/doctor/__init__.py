"""What a machine can run, and what a configuration needs before it is started."""

from avar_lightning.doctor.diagnosis import Diagnosis, DoctorConfig, diagnose

__all__ = ["Diagnosis", "DoctorConfig", "diagnose"]
