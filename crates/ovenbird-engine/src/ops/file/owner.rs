//! `--chown=user[:group]`: names are looked up in the base's own files.

use std::path::Path;

use super::FileError;
use crate::snapshot::tree::Tree;
use crate::snapshot::view::read_text;

/// Ids of `user[:group]`. A number without a group is the group, too; a name without a group has its
/// primary group; an empty user is root.
pub(crate) fn lookup(spec: &str, base: &dyn Tree) -> Result<(u32, u32), FileError> {
    let (user, group) = spec.split_once(':').unwrap_or((spec, ""));
    let unknown = |name: &str, file| FileError::Owner { spec: spec.to_owned(), name: name.to_owned(), file };
    let (uid, primary) = match user.parse::<u32>() {
        _ if user.is_empty() => (0, 0),
        Ok(id) => (id, id),
        Err(_) => row(base, "/etc/passwd", user)
            .and_then(|fields| Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?)))
            .ok_or_else(|| unknown(user, "/etc/passwd"))?,
    };
    let gid = match group.parse::<u32>() {
        _ if group.is_empty() => primary,
        Ok(id) => id,
        Err(_) => {
            row(base, "/etc/group", group).and_then(|fields| fields.get(2)?.parse().ok()).ok_or_else(|| unknown(group, "/etc/group"))?
        }
    };
    Ok((uid, gid))
}

fn row(base: &dyn Tree, file: &str, name: &str) -> Option<Vec<String>> {
    debug_assert!(Path::new(file).is_absolute());
    let text = read_text(base, file)?;
    text.lines()
        .map(|line| line.split(':'))
        .find(|fields| fields.clone().next() == Some(name))
        .map(|fields| fields.map(str::to_owned).collect())
}
