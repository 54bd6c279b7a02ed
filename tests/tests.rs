// Files that lie: one test a lie, each refused in time and with a reason.
mod hostile;
