"""Learning-rate schedules: each a pure function of the step."""
