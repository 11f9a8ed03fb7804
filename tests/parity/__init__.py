"""The same training by torch and by ours: values, states and replays are equal. A comparison with torch goes here."""
