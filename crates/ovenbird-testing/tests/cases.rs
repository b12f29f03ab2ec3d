//! The literate build cases: every heading of `tests/cases/**/*.md` is one test.
//! `OVENBIRD_TESTS_LEVEL=root|rootless|single-id|traced|worker|docker|docker-builder` says whom the command runs as.

use libtest_mimic::{Arguments, Failed, Trial};
use ovenbird_testing::case::{self, Case};
use ovenbird_testing::command::Level;
use ovenbird_testing::deviations;
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::pair::{self, Outcome};
use ovenbird_testing::{repository, runner};

fn main() {
    let arguments = Arguments::from_args();
    let level = match std::env::var("OVENBIRD_TESTS_LEVEL") {
        Ok(word) => Level::parse(&word).unwrap_or_else(|| {
            panic!("OVENBIRD_TESTS_LEVEL={word} is none of root, rootless, single-id, traced, worker, docker, docker-builder")
        }),
        Err(_) => Level::default(),
    };
    let cases = case::read_all(&repository().join("tests/cases")).unwrap_or_else(|error| panic!("{error}"));
    let trials = cases.into_iter().map(|case| Trial::test(case.name.clone(), move || one(&case, level))).collect();
    libtest_mimic::run(&arguments, trials).exit();
}

fn one(case: &Case, level: Level) -> Result<(), Failed> {
    let mut wanted = case.needs.clone();
    match level {
        Level::Own | Level::Worker => {}
        Level::Docker | Level::DockerBuilder => wanted.push(Need::Docker),
        Level::Rootless | Level::SingleId | Level::Traced => wanted.push(Need::Users),
    }
    if !needs::available(&case.name, &wanted) {
        return Ok(());
    }
    if let Some(reason) = case.needs.iter().find_map(|need| needs::missing_at(level, *need)) {
        needs::skip(&case.name, reason);
        return Ok(());
    }
    let place = format!("{}:{}", case.file.strip_prefix(repository()).unwrap_or(&case.file).display(), case.line);
    if level == Level::DockerBuilder {
        return beside_the_client(case, &place);
    }
    match runner::run(case, level) {
        Ok(differences) if differences.is_empty() => Ok(()),
        Ok(differences) => Err(format!("{place}\n{}", differences.join("\n")).into()),
        Err(error) => Err(format!("{place}\n{error}").into()),
    }
}

/// `OVENBIRD_TESTS_OUTCOMES=FILE` gets a line for each case.
fn beside_the_client(case: &Case, place: &str) -> Result<(), Failed> {
    let outcome = pair::compare(case).map_err(|error| format!("{place}\n{error}"))?;
    if let Some(list) = std::env::var_os("OVENBIRD_TESTS_OUTCOMES") {
        pair::note(list.as_ref(), &case.name, &outcome).map_err(|error| error.to_string())?;
    }
    match outcome {
        Outcome::Differs(_) if deviations::read(Level::DockerBuilder).is_ok_and(|listed| listed.contains_key(&case.name)) => Ok(()),
        Outcome::Differs(differences) => Err(format!("{place}\n{}", differences.join("\n")).into()),
        _ => Ok(()),
    }
}
