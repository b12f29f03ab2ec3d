//! The machine in words that name neither it nor its folders.

use std::fs;
use std::path::Path;
use std::process::Command;

/// What matters for the figures.
#[derive(Debug)]
pub(super) struct About {
    processors: usize,
    model: String,
    memory_gib: u64,
    file_system: String,
    kernel: String,
}

impl About {
    /// Of this machine; `work` is where builders work.
    pub(super) fn look(work: &Path) -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let kib = field(&read("/proc/meminfo"), "MemTotal").split(' ').next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        // Of the deepest mount point above it: `statfs` has one number for three generations of ext.
        let mounts = read("/proc/self/mounts");
        let fields = mounts.lines().filter_map(|line| line.split(' ').skip(1).take(2).collect::<Vec<_>>().try_into().ok());
        let below = fields.filter(|[point, _]: &[&str; 2]| work.starts_with(point));
        let file_system = below.max_by_key(|[point, _]| point.len()).map(|[_, kind]| kind.to_owned()).unwrap_or_default();
        Self {
            processors: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            model: field(&read("/proc/cpuinfo"), "model name"),
            memory_gib: (kib + (1 << 19)) >> 20,
            file_system,
            kernel: read("/proc/sys/kernel/osrelease").split('.').take(2).collect::<Vec<_>>().join("."),
        }
    }

    /// One line.
    pub(super) fn describe(&self) -> String {
        let Self { processors, model, memory_gib, file_system, kernel } = self;
        format!("{processors} processors ({model}), {memory_gib} GiB of memory, {file_system}, Linux {kernel}")
    }
}

/// The three load averages.
pub(super) fn load() -> String {
    fs::read_to_string("/proc/loadavg").unwrap_or_default().split(' ').take(3).collect::<Vec<_>>().join(" ")
}

/// Today, `2026-01-31`.
pub(super) fn date() -> String {
    ovenbird_testing::process::output(Command::new("date").args(["-u", "+%F"])).unwrap_or_default().trim().to_owned()
}

/// Waits until removed files are forgotten: ext4 does not use an inode again within a minute after its file was removed from the disk, and
/// whoever makes many files meanwhile pays for the search.
/// Source: linux/fs/ext4/ialloc.c, `recently_deleted`.
pub(super) fn settle() {
    rustix::fs::sync();
    std::thread::sleep(std::time::Duration::from_secs(62));
}
