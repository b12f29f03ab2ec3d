//! Users and groups of an image, looked up in its own files: who a step runs as (`USER`), and whom a name of `--chown` means.

use ovenbird_sandbox::StepUser;

use crate::snapshot::tree::Tree;
use crate::snapshot::view::read_text;

/// Where users are listed.
pub const PASSWD: &str = "/etc/passwd";
/// Where groups are listed.
pub const GROUP: &str = "/etc/group";

/// Docker's bounds; the kernel takes the largest number for "leave it as it is".
const ID_MAX: u32 = i32::MAX as u32;

/// A user that a step can run as.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Account {
    /// Ids.
    pub user: StepUser,
    /// Home folder from the image, `/root` for uid 0 without an entry, else `/`.
    pub home: String,
}

/// Why there is no such account.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AccountError {
    /// A name without an entry.
    #[error("unable to find {what} {name}: no matching entries in {file} of the image")]
    Unknown {
        /// `user` or `group`.
        what: &'static str,
        /// As written.
        name: String,
        /// The list.
        file: &'static str,
    },
    /// An id that no process can have.
    #[error("the {what} id {id} of {name:?} is out of range: ids go from 0 to {ID_MAX}")]
    Range {
        /// `user` or `group`.
        what: &'static str,
        /// As written.
        name: String,
        /// Its number.
        id: u32,
    },
}

/// An entry of `/etc/passwd`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User<'a> {
    /// Name.
    pub name: &'a str,
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Home folder; may be empty.
    pub home: &'a str,
}

/// The two lists of an image; a missing one is empty.
#[derive(Debug, Clone, Default)]
pub struct Accounts {
    passwd: String,
    group: String,
}

impl Accounts {
    /// Of a root file system.
    pub fn read(tree: &dyn Tree) -> Self {
        Self { passwd: read_text(tree, PASSWD).unwrap_or_default(), group: read_text(tree, GROUP).unwrap_or_default() }
    }

    fn users(&self) -> impl Iterator<Item = User<'_>> {
        rows(&self.passwd).filter_map(|row| {
            let [name, _, uid, gid, ref rest @ ..] = row[..] else { return None };
            Some(User { name, uid: uid.parse().ok()?, gid: gid.parse().ok()?, home: rest.get(1).copied().unwrap_or_default() })
        })
    }

    /// (name, id, members).
    fn groups(&self) -> impl Iterator<Item = (&str, u32, &str)> {
        rows(&self.group).filter_map(|row| {
            let [name, _, gid, ref rest @ ..] = row[..] else { return None };
            Some((name, gid.parse().ok()?, rest.first().copied().unwrap_or_default()))
        })
    }

    /// The first entry of that name.
    pub fn user(&self, name: &str) -> Option<User<'_>> {
        self.users().find(|user| user.name == name)
    }

    /// Id of the first group of that name.
    pub fn group(&self, name: &str) -> Option<u32> {
        self.groups().find(|group| group.0 == name).map(|group| group.1)
    }

    /// Looks up `user[:group]`; empty is root. Source: `USER` in the Dockerfile reference, runc's user lookup.
    pub fn lookup(&self, spec: &str) -> Result<Account, AccountError> {
        let (name, group) = spec.split_once(':').unwrap_or((spec, ""));
        let name = if name.is_empty() { "0" } else { name };
        let number: Option<u32> = name.parse().ok();
        let entry = self.user(name).or_else(|| self.users().find(|user| Some(user.uid) == number));
        let unknown = |what, name: &str, file| AccountError::Unknown { what, name: name.to_owned(), file };
        let uid = entry.as_ref().map(|user| user.uid).or(number).ok_or_else(|| unknown("user", name, PASSWD))?;
        let (gid, groups) = match (group, &entry) {
            ("", None) => (0, vec![]),
            ("", Some(user)) => {
                let is_member = |members: &str| members.split(',').any(|member| member == user.name);
                (user.gid, self.groups().filter(|group| is_member(group.2) && group.1 != user.gid).map(|group| group.1).collect())
            }
            (group, _) => (self.group(group).or_else(|| group.parse().ok()).ok_or_else(|| unknown("group", group, GROUP))?, vec![]),
        };
        for (what, id) in [("user", uid), ("group", gid)].into_iter().chain(groups.iter().map(|id| ("group", *id))) {
            if id > ID_MAX {
                return Err(AccountError::Range { what, name: spec.to_owned(), id });
            }
        }
        let home = match entry.map(|user| user.home).filter(|home| !home.is_empty()) {
            Some(home) => home,
            None if uid == 0 => "/root",
            None => "/",
        };
        Ok(Account { user: StepUser { uid, gid, groups }, home: home.to_owned() })
    }
}

fn rows(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.lines().map(|line| line.split(':').collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_groups() {
        let accounts = Accounts {
            passwd: "root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:1000:1001::/home/app:/bin/sh\nevil:x:4294967295:0:::\n".to_owned(),
            group: "root:x:0:\napp:x:1001:\nwheel:x:10:app,root\nbin:x:1:\n".to_owned(),
        };
        let rows: &[(&str, Result<(u32, u32, &[u32], &str), &str>)] = &[
            ("", Ok((0, 0, &[10], "/root"))),
            ("root", Ok((0, 0, &[10], "/root"))),
            ("app", Ok((1000, 1001, &[10], "/home/app"))),
            ("1000", Ok((1000, 1001, &[10], "/home/app"))),
            ("app:bin", Ok((1000, 1, &[], "/home/app"))),
            ("app:77", Ok((1000, 77, &[], "/home/app"))),
            ("4242", Ok((4242, 0, &[], "/"))),
            ("4242:4243", Ok((4242, 4243, &[], "/"))),
            ("nobody", Err("unable to find user nobody")),
            ("app:nogroup", Err("unable to find group nogroup")),
            ("4294967295", Err("out of range")),
            ("0:2147483648", Err("out of range")),
            ("evil", Err("out of range")),
        ];
        for (spec, expect) in rows {
            match (accounts.lookup(spec), expect) {
                (Ok(got), Ok((uid, gid, extra, home))) => {
                    assert_eq!(
                        (got.user.uid, got.user.gid, &got.user.groups[..], got.home.as_str()),
                        (*uid, *gid, *extra, *home),
                        "{spec}"
                    );
                }
                (Err(got), Err(expect)) => assert!(got.to_string().contains(expect), "{spec}: {got}"),
                (got, _) => panic!("{spec}: {got:?}"),
            }
        }
        assert_eq!(Accounts::default().lookup("").unwrap().home, "/root");
    }
}
