"""Speed races: the same work done by this project and by TRL, each in a process of its own, taking turns."""
