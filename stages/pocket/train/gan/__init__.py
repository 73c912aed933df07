"""Make the generators of the gan stage from nothing: `python -m stages.pocket.train gan`, one class after another.

bank.py            pictures of a class's objects with their cameras
discriminator.py   the two towers, told the camera
losses.py          what they and the generator minimise
trainer.py         the schedule, its state, and the export
"""
