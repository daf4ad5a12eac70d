"""Other methods of editing, in the same harness: same data, same losses, same schedule, same measures."""
