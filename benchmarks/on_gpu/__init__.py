"""What `srigl bench gpu` needs beside what it shares with the CPU benchmark."""
