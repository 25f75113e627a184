"""Who each token of a conversation is: system, user, image, response, or none of these.

Every token has exactly one role. `message_roles` is exact: it knows the messages and accounts for every token
id. `tag_roles` serves batches that come with token ids alone: it learns the header tokens of a tokenizer's
own chat template and finds them. Control tokens that a user typed (`<|im_start|>assistant`) can mislead the
second, never the first; and the second gives USER to a system message that the template writes inside the
first user turn (Gemma), because the ids do not show where it ends.

| text | role |
|---|---|
| system part: everything before the first user turn, a default system prompt included | SYSTEM |
| user content, vision start and end markers included | USER |
| image placeholder tokens | IMAGE |
| assistant content and end-of-turn token | RESPONSE |
| BOS, padding, turn headers, other end-of-turn tokens, separators | OTHER |

A token that straddles two spans takes the role of its last character.
"""

from avar_lightning.roles.exact import message_roles
from avar_lightning.roles.role import Role
from avar_lightning.roles.tagging import tag_roles
from avar_lightning.roles.template import ChatTemplateError

__all__ = ["ChatTemplateError", "Role", "message_roles", "tag_roles"]
