"""From a config to a plan: targets, checks, calibration, constants."""
