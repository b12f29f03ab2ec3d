//! The calls that tell and set ids and capabilities.

use libc::{c_int, c_long};

use super::calls::PRCTL;
use super::process::Verdict;
use super::tracer::Tracer;
use crate::caps;

/// `_LINUX_CAPABILITY_VERSION_3`: two structs of three words.
const CAPABILITIES_V3: u32 = 0x2008_0522;
const CAPABILITIES_V2: u32 = 0x2007_1026;

impl Tracer {
    /// `None`: another kind of call.
    pub(super) fn ids(&mut self, thread: i32, number: c_long, args: [u64; 6]) -> Result<Option<Verdict>, c_int> {
        let process = self.process(thread)?;
        let credentials = &process.credentials;
        let value = match number {
            libc::SYS_getuid => credentials.user.real.into(),
            libc::SYS_geteuid => credentials.user.effective.into(),
            libc::SYS_getgid => credentials.group.real.into(),
            libc::SYS_getegid => credentials.group.effective.into(),
            libc::SYS_getresuid | libc::SYS_getresgid => {
                let ids = if number == libc::SYS_getresuid { credentials.user } else { credentials.group };
                let memory = process.memory()?;
                for (at, id) in [(args[0], ids.real), (args[1], ids.effective), (args[2], ids.saved)] {
                    memory.write_ids(at, &[id])?;
                }
                0
            }
            libc::SYS_getgroups => {
                let groups = credentials.groups.clone();
                let room = args[0] as c_int;
                if room != 0 {
                    if usize::try_from(room).map_or(true, |room| room < groups.len()) {
                        return Err(libc::EINVAL);
                    }
                    process.memory()?.write_ids(args[1], &groups)?;
                }
                groups.len() as i64
            }
            libc::SYS_setuid
            | libc::SYS_setgid
            | libc::SYS_setreuid
            | libc::SYS_setregid
            | libc::SYS_setresuid
            | libc::SYS_setresgid
            | libc::SYS_setfsuid
            | libc::SYS_setfsgid
            | libc::SYS_setgroups => {
                let mut now = credentials.clone();
                let memory = process.memory()?;
                let value = now.change(number, args, |at, count| memory.read_ids(at, count))?;
                process.credentials = now;
                value
            }
            libc::SYS_capget => {
                let root = credentials.user.effective == 0;
                let memory = process.memory()?;
                let version = memory.read_ids(args[0], 1)?[0];
                if version != CAPABILITIES_V3 && version != CAPABILITIES_V2 {
                    memory.write_ids(args[0], &[CAPABILITIES_V3])?;
                    return if args[1] == 0 { Ok(Some(Verdict::Answer(0))) } else { Err(libc::EINVAL) };
                }
                if args[1] != 0 {
                    let all = if root { caps::DOCKER } else { 0 };
                    let (low, high) = (all as u32, (all >> 32) as u32);
                    memory.write_ids(args[1], &[low, low, 0, high, high, 0])?;
                }
                0
            }
            // Nothing here depends on them.
            libc::SYS_capset => 0,
            libc::SYS_prctl if PRCTL.contains(&(args[0] as u32)) => 0,
            _ => return Ok(None),
        };
        Ok(Some(Verdict::Answer(value)))
    }
}
