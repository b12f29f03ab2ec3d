//! `USER`: names and ids to what a step runs as, looked up in the image's own files.

use ovenbird_sandbox::StepUser;

/// Reads small files of the image by absolute path.
pub type ReadFile<'a> = dyn Fn(&str) -> Option<String> + 'a;

/// A user that a step can run as.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Account {
    /// Ids.
    pub user: StepUser,
    /// Home folder from the image, `/root` for uid 0 without an entry, else `/`.
    pub home: String,
}

/// Looks up `user[:group]`; empty is root. Source: `USER` in the Dockerfile reference, runc's user lookup.
pub fn lookup(spec: &str, read: &ReadFile) -> Result<Account, String> {
    let (user, group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (spec, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let passwd = read("/etc/passwd").unwrap_or_default();
    let groups = read("/etc/group").unwrap_or_default();
    let entry = rows(&passwd, 7).find(|row| row[0] == user).or_else(|| {
        let id: u32 = user.parse().ok()?;
        rows(&passwd, 7).find(|row| row[2].parse() == Ok(id))
    });
    let uid = match (&entry, user.parse::<u32>()) {
        (Some(row), _) => row[2].parse().map_err(|_| format!("/etc/passwd has no valid id for {user:?}"))?,
        (None, Ok(id)) => id,
        (None, Err(_)) => return Err(format!("unable to find user {user}: no matching entries in /etc/passwd of the image")),
    };
    let (gid, extra) = match group {
        Some(group) => (group_id(group, &groups)?, vec![]),
        None => {
            let gid = entry.as_ref().and_then(|row| row[3].parse().ok()).unwrap_or(0);
            let extra = entry.as_ref().map_or(vec![], |row| {
                rows(&groups, 4)
                    .filter(|g| g[3].split(',').any(|member| member == row[0]))
                    .filter_map(|g| g[2].parse().ok())
                    .filter(|id| *id != gid)
                    .collect()
            });
            (gid, extra)
        }
    };
    let home = entry
        .map(|row| row[5].to_owned())
        .filter(|home| !home.is_empty())
        .unwrap_or_else(|| if uid == 0 { "/root".into() } else { "/".into() });
    Ok(Account { user: StepUser { uid, gid, groups: extra }, home })
}

fn group_id(group: &str, groups: &str) -> Result<u32, String> {
    match (rows(groups, 4).find(|row| row[0] == group), group.parse()) {
        (Some(row), _) => row[2].parse().map_err(|_| format!("/etc/group has no valid id for {group:?}")),
        (None, Ok(id)) => Ok(id),
        (None, Err(_)) => Err(format!("unable to find group {group}: no matching entries in /etc/group of the image")),
    }
}

fn rows(text: &str, fields: usize) -> impl Iterator<Item = Vec<&str>> {
    text.lines().map(|line| line.split(':').collect::<Vec<_>>()).filter(move |row| row.len() >= fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_groups() {
        let read = |path: &str| {
            Some(match path {
                "/etc/passwd" => "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n".to_owned(),
                _ => "root:x:0:\napp:x:1001:\nwheel:x:10:app,root\nbin:x:1:\n".to_owned(),
            })
        };
        let none = |_: &str| None;
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
        ];
        for (spec, expect) in rows {
            match (lookup(spec, &read), expect) {
                (Ok(got), Ok((uid, gid, extra, home))) => {
                    assert_eq!(
                        (got.user.uid, got.user.gid, &got.user.groups[..], got.home.as_str()),
                        (*uid, *gid, *extra, *home),
                        "{spec}"
                    );
                }
                (Err(got), Err(expect)) => assert!(got.contains(expect), "{spec}: {got}"),
                (got, _) => panic!("{spec}: {got:?}"),
            }
        }
        assert_eq!(lookup("", &none).unwrap().home, "/root");
    }
}
