//! Who a process of a step is, where that is made up: the ids that it sees and sets without having them.

use libc::{c_int, c_long};

/// An id that a call leaves as it is.
pub(crate) const UNCHANGED: u32 = u32::MAX;
/// `NGROUPS_MAX`.
const GROUPS_MAX: u64 = 65536;

/// Real, effective and saved id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ids {
    pub(crate) real: u32,
    pub(crate) effective: u32,
    pub(crate) saved: u32,
}

/// User, group and supplementary groups.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Credentials {
    pub(crate) user: Ids,
    pub(crate) group: Ids,
    pub(crate) groups: Vec<u32>,
}

impl Credentials {
    pub(crate) fn new(uid: u32, gid: u32, groups: Vec<u32>) -> Credentials {
        Credentials { user: Ids::all(uid), group: Ids::all(gid), groups }
    }

    pub(crate) fn is_root(&self) -> bool {
        self.user == Ids::all(0) && self.group == Ids::all(0) && self.groups.iter().all(|group| *group == 0)
    }

    /// Who owns what it makes.
    pub(crate) fn maker(&self) -> (u32, u32) {
        (self.user.effective, self.group.effective)
    }

    /// One of the calls that set ids; its result. `groups` reads so many ids at an address.
    pub(crate) fn change(
        &mut self,
        number: c_long,
        args: [u64; 6],
        groups: impl FnOnce(u64, usize) -> Result<Vec<u32>, c_int>,
    ) -> Result<i64, c_int> {
        let privileged = self.user.effective == 0;
        let (a0, a1, a2) = (args[0] as u32, args[1] as u32, args[2] as u32);
        let mut value = 0;
        match number {
            libc::SYS_setuid => self.user.set(privileged, a0)?,
            libc::SYS_setgid => self.group.set(privileged, a0)?,
            libc::SYS_setreuid => self.user.set_two(privileged, a0, a1)?,
            libc::SYS_setregid => self.group.set_two(privileged, a0, a1)?,
            libc::SYS_setresuid => self.user.set_three(privileged, a0, a1, a2)?,
            libc::SYS_setresgid => self.group.set_three(privileged, a0, a1, a2)?,
            // The file system id follows the effective one; these return the old value and never fail.
            libc::SYS_setfsuid => value = i64::from(self.user.effective),
            libc::SYS_setfsgid => value = i64::from(self.group.effective),
            libc::SYS_setgroups => {
                if !privileged {
                    return Err(libc::EPERM);
                }
                if args[0] > GROUPS_MAX {
                    return Err(libc::EINVAL);
                }
                self.groups = groups(args[1], args[0] as usize)?;
            }
            _ => return Err(libc::ENOSYS),
        }
        Ok(value)
    }

    /// What the `exec` of a program with this mode and owner does.
    pub(crate) fn become_owner(&mut self, mode: u32, (uid, gid): (u32, u32)) {
        if mode & libc::S_ISUID != 0 {
            (self.user.effective, self.user.saved) = (uid, uid);
        }
        if mode & libc::S_ISGID != 0 {
            (self.group.effective, self.group.saved) = (gid, gid);
        }
    }

    /// Whether a file of `old` may be given to these ids.
    pub(crate) fn may_give(&self, old: (u32, u32), uid: u32, gid: u32) -> bool {
        let same_user = uid == UNCHANGED || uid == old.0;
        let own_group = gid == UNCHANGED || gid == old.1 || self.group.effective == gid || self.groups.contains(&gid);
        self.user.effective == 0 || (same_user && own_group)
    }
}

/// `credentials(7)`: what each call may change.
impl Ids {
    pub(crate) fn all(id: u32) -> Ids {
        Ids { real: id, effective: id, saved: id }
    }

    fn set(&mut self, privileged: bool, id: u32) -> Result<(), c_int> {
        if id == UNCHANGED {
            return Err(libc::EINVAL);
        }
        if privileged {
            *self = Ids::all(id);
        } else if id == self.real || id == self.saved {
            self.effective = id;
        } else {
            return Err(libc::EPERM);
        }
        Ok(())
    }

    fn set_two(&mut self, privileged: bool, real: u32, effective: u32) -> Result<(), c_int> {
        let old = *self;
        if !privileged && ((real != UNCHANGED && real != old.real && real != old.effective) || !self.may(effective)) {
            return Err(libc::EPERM);
        }
        self.real = pick(real, old.real);
        self.effective = pick(effective, old.effective);
        if real != UNCHANGED || (effective != UNCHANGED && effective != old.real) {
            self.saved = self.effective;
        }
        Ok(())
    }

    fn set_three(&mut self, privileged: bool, real: u32, effective: u32, saved: u32) -> Result<(), c_int> {
        if !privileged && ![real, effective, saved].into_iter().all(|id| self.may(id)) {
            return Err(libc::EPERM);
        }
        *self = Ids { real: pick(real, self.real), effective: pick(effective, self.effective), saved: pick(saved, self.saved) };
        Ok(())
    }

    fn may(self, id: u32) -> bool {
        id == UNCHANGED || [self.real, self.effective, self.saved].contains(&id)
    }
}

fn pick(new: u32, old: u32) -> u32 {
    if new == UNCHANGED { old } else { new }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP: u32 = UNCHANGED;

    #[test]
    fn ids_change_as_the_kernel_changes_them() {
        let ids = |real, effective, saved| Ids { real, effective, saved };
        type Change = fn(&mut Ids, bool) -> Result<(), c_int>;
        let refused = Err(libc::EPERM);
        let rows: [(&str, Ids, Change, Result<Ids, c_int>); 13] = [
            ("root drops all", Ids::all(0), |ids, root| ids.set(root, 5), Ok(Ids::all(5))),
            ("and cannot go back", Ids::all(5), |ids, root| ids.set(root, 0), refused),
            ("setuid to the saved id", ids(5, 5, 0), |ids, root| ids.set(root, 0), Ok(ids(5, 0, 0))),
            ("-1 is no id", Ids::all(0), |ids, root| ids.set(root, KEEP), Err(libc::EINVAL)),
            ("seteuid keeps the way back", Ids::all(0), |ids, root| ids.set_three(root, KEEP, 5, KEEP), Ok(ids(0, 5, 0))),
            ("the way back", ids(0, 5, 0), |ids, root| ids.set_three(root, KEEP, 0, KEEP), Ok(Ids::all(0))),
            ("a stranger's id", ids(4, 5, 6), |ids, root| ids.set_three(root, 7, KEEP, KEEP), refused),
            ("own ids in any order", ids(4, 5, 6), |ids, root| ids.set_three(root, 6, 4, 5), Ok(ids(6, 4, 5))),
            ("setreuid sets saved with real", Ids::all(0), |ids, root| ids.set_two(root, 5, 6), Ok(ids(5, 6, 6))),
            ("setreuid to own real keeps saved", ids(4, 5, 6), |ids, root| ids.set_two(root, KEEP, 4), Ok(ids(4, 4, 6))),
            ("setreuid swaps", ids(4, 5, 5), |ids, root| ids.set_two(root, 5, 4), Ok(ids(5, 4, 4))),
            ("setreuid real may not be the saved one", ids(4, 5, 6), |ids, root| ids.set_two(root, 6, KEEP), refused),
            ("nothing", ids(4, 5, 6), |ids, root| ids.set_two(root, KEEP, KEEP), Ok(ids(4, 5, 6))),
        ];
        for (name, before, change, want) in rows {
            let mut now = before;
            let got = change(&mut now, before.effective == 0).map(|()| now);
            assert_eq!(got, want, "{name}");
            if got.is_err() {
                assert_eq!(now, before, "{name}: nothing changes");
            }
        }
    }
}
