"""Commands of ``layton`` that need the generator; `layton.commands.COMMANDS` names them, nothing else does."""
