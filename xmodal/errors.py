"""The one exception that ends a command in a single line."""


class UserError(ValueError):
  """Something the person at the keyboard can mend.

  The message names the thing, what was found, what was wanted and the way
  out, in one line. Commands print it after 'error: ' and exit with code 2;
  anything else that is raised is a defect and keeps its traceback.
  """
