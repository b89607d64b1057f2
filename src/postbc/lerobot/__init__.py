"""PostBC for any LeRobot policy: the posterior of a LeRobotDataset's frames, LeRobot's own training on PostBC's targets, and LeRobot's
policies as ours. LeRobot is imported only where it is used (extra `lerobot`, Python 3.12 and up)."""
