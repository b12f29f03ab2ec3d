//! `--chown=user[:group]`: names are looked up in the base's own files.

use super::FileError;
use crate::ops::account::{Accounts, GROUP, PASSWD};
use crate::snapshot::tree::Tree;

/// Ids of `user[:group]`. A number without a group is the group, too; a name without a group has its
/// primary group; an empty user is root.
pub(crate) fn lookup(spec: &str, base: &dyn Tree) -> Result<(u32, u32), FileError> {
    let (user, group) = spec.split_once(':').unwrap_or((spec, ""));
    let unknown = |name: &str, file| FileError::Owner { spec: spec.to_owned(), name: name.to_owned(), file };
    // The largest number is no id: to `chown` it means "leave it".
    let id = |part: &str| part.parse::<u32>().ok().filter(|id| *id != u32::MAX);
    let is_name = |part: &str| !part.is_empty() && id(part).is_none();
    let accounts = if is_name(user) || is_name(group) { Accounts::read(base) } else { Accounts::default() };
    let (uid, primary) = match id(user) {
        _ if user.is_empty() => (0, 0),
        Some(id) => (id, id),
        None => accounts.user(user).map(|user| (user.uid, user.gid)).ok_or_else(|| unknown(user, PASSWD))?,
    };
    let gid = match id(group) {
        _ if group.is_empty() => primary,
        Some(id) => id,
        None => accounts.group(group).ok_or_else(|| unknown(group, GROUP))?,
    };
    Ok((uid, gid))
}
