//! Debian packages that chores need: installed by name when this process may, else named.

use std::process::Command;

/// Installs those that are missing, as root or through `sudo -n`. Where that is not allowed it says what is missing and goes on:
/// the tests that need them are skipped with a reason.
pub(crate) fn install(packages: &[&str]) -> Result<(), String> {
    if !on_path("apt-get") {
        eprintln!("this is no Debian machine; needed: {}", packages.join(" "));
        return Ok(());
    }
    let missing: Vec<&str> = packages.iter().copied().filter(|package| !is_installed(package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("installing {}", missing.join(" "));
    let root = output("id", &["-u"]).is_some_and(|id| id.trim() == "0");
    if !root && output("sudo", &["-n", "true"]).is_none() {
        eprintln!("not root, and sudo asks for a password. To install them: sudo apt-get install {}", missing.join(" "));
        return Ok(());
    }
    for words in [&["update", "--quiet"][..], &[&["install", "--yes", "--quiet", "--no-install-recommends"], &missing[..]].concat()] {
        let (program, first): (&str, &[&str]) = if root { ("env", &[]) } else { ("sudo", &["-n", "env"]) };
        let mut command = Command::new(program);
        command.args(first).args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]).args(words);
        let status = command.status().map_err(|error| format!("cannot start apt-get: {error}"))?;
        if !status.success() {
            return Err(format!("apt-get {} ended with {status}", words.join(" ")));
        }
    }
    Ok(())
}

fn is_installed(package: &str) -> bool {
    output("dpkg-query", &["--show", "--showformat=${db:Status-Status}", package]).is_some_and(|state| state == "installed")
}

/// Standard output of a command that ended well.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let done = Command::new(program).args(arguments).output().ok()?;
    done.status.success().then(|| String::from_utf8_lossy(&done.stdout).into_owned())
}

/// Is a program there?
pub(crate) fn on_path(program: &str) -> bool {
    ovenbird_testing::process::on_path(program)
}
