//! The process environment, read once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Variables, home, working directory: a value, so that everything that depends on it can be tested.
#[derive(Clone, PartialEq, Eq)]
pub struct Environment {
    variables: BTreeMap<String, String>,
    working_directory: PathBuf,
    system_config: Option<PathBuf>,
    now: i64,
}

impl std::fmt::Debug for Environment {
    /// Names only: values may be secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Environment").field("variables", &self.variables.keys()).finish_non_exhaustive()
    }
}

impl Environment {
    /// Of this process. Variables that are not UTF-8 are left out.
    pub fn current() -> Self {
        Self {
            variables: std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))).collect(),
            working_directory: std::env::current_dir().unwrap_or_else(|_| "/".into()),
            system_config: Some("/etc/ovenbird/config.toml".into()),
            now: jiff::Timestamp::now().as_second(),
        }
    }

    /// Exactly this one.
    pub fn fixed(variables: BTreeMap<String, String>, working_directory: impl Into<PathBuf>, system_config: Option<PathBuf>) -> Self {
        Self { variables, working_directory: working_directory.into(), system_config, now: 0 }
    }

    /// When this process began, seconds since 1970.
    pub fn now(&self) -> i64 {
        self.now
    }

    /// A variable.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str)
    }

    /// Every variable.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.variables.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Where the command was started.
    pub fn working_directory(&self) -> &Path {
        &self.working_directory
    }

    /// `HOME`.
    pub fn home(&self) -> Option<&Path> {
        self.get("HOME").filter(|home| !home.is_empty()).map(Path::new)
    }

    /// The settings file of the machine.
    pub fn system_config(&self) -> Option<&Path> {
        self.system_config.as_deref()
    }

    /// `$XDG_CONFIG_HOME` or `~/.config`. Source: XDG Base Directory Specification; a relative value is invalid and not used.
    pub fn config_home(&self) -> Option<PathBuf> {
        self.base("XDG_CONFIG_HOME", ".config")
    }

    /// `$XDG_DATA_HOME` or `~/.local/share`.
    pub fn data_home(&self) -> Option<PathBuf> {
        self.base("XDG_DATA_HOME", ".local/share")
    }

    fn base(&self, name: &str, below_home: &str) -> Option<PathBuf> {
        let said = self.get(name).map(PathBuf::from).filter(|path| path.is_absolute());
        said.or_else(|| self.home().map(|home| home.join(below_home)))
    }

    /// A path seen from the working directory.
    pub fn absolute(&self, path: &Path) -> PathBuf {
        self.working_directory.join(path)
    }

    /// Where a program is on `PATH`.
    pub fn find_program(&self, name: &str) -> Option<PathBuf> {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.get("PATH").unwrap_or("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        path.split(':')
            .filter(|dir| !dir.is_empty())
            .map(|dir| Path::new(dir).join(name))
            .find(|file| file.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_directories_and_redaction() {
        let of =
            |vars: &[(&str, &str)]| Environment::fixed(vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(), "/w", None);
        assert_eq!(of(&[("HOME", "/h")]).data_home(), Some("/h/.local/share".into()));
        assert_eq!(of(&[("HOME", "/h"), ("XDG_DATA_HOME", "relative")]).data_home(), Some("/h/.local/share".into()));
        assert_eq!(of(&[]).data_home(), None);
        assert_eq!(of(&[]).absolute(Path::new("a")), Path::new("/w/a"));
        assert!(of(&[("PATH", "/usr/bin:/bin")]).find_program("sh").is_some());
        assert!(!format!("{:?}", of(&[("TOKEN", "hunter2")])).contains("hunter2"));
    }
}
