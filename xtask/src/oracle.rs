//! `oracle`: every literate case built by the command and by a current Docker Engine, and the two images compared.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use ovenbird_testing::base::Base;
use ovenbird_testing::case::{self, Case};
use ovenbird_testing::command::Level;
use ovenbird_testing::deviations::{self, Listed};
use ovenbird_testing::needs;
use ovenbird_testing::oracle::{Oracle, Outcome};
use ovenbird_testing::registry::{Options, Registry};
use ovenbird_testing::repository;
use regex::Regex;

/// How one case counts.
#[derive(Debug)]
enum Verdict {
    Equal,
    BothRefuse(String),
    Deviation,
    NotComparable(String),
    Differs(String),
}

pub(crate) fn run(words: &[&str]) -> Result<(), String> {
    let (mut level, mut filter, mut refusals) = (Level::Own, None, false);
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        if *word == "--refusals" {
            refusals = true;
            continue;
        }
        let value = rest.next().ok_or_else(|| format!("{word} needs a value"))?;
        match *word {
            "--level" => {
                let known = Level::parse(value).filter(|level| *level != Level::Docker);
                level = known.ok_or("--level needs root, rootless or single-id")?;
            }
            "-m" => filter = Some(Regex::new(value).map_err(|error| error.to_string())?),
            other => return Err(format!("unknown argument {other:?}\n{}", crate::USAGE)),
        }
    }
    crate::run(Command::new(crate::cargo()).args(["build", "--package", "ovenbird-cli"]))?;
    let text = |error: ovenbird_testing::Error| error.to_string();
    let all = case::read_all(&repository().join("tests/cases")).map_err(text)?;
    let listed = deviations::read(level).map_err(text)?;
    let unknown: Vec<&String> = listed.keys().filter(|name| all.iter().all(|case| case.name != **name)).collect();
    if !unknown.is_empty() {
        return Err(format!("docs/reference/deviations.md names cases that are not there: {unknown:?}"));
    }
    let cases: Vec<Case> = all.into_iter().filter(|case| filter.as_ref().is_none_or(|filter| filter.is_match(&case.name))).collect();
    let start = Instant::now();
    let registry = Registry::start_with(Options { bases: &[Base::Busybox, Base::Debian], credentials: None }).map_err(text)?;
    let oracle = Oracle::start(&format!("http://{}", registry.address())).map_err(text)?;
    let verdicts = Mutex::new(BTreeMap::new());
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let verdict = judge(&oracle, case, level, listed.get(&case.name).copied());
                    if let Verdict::Differs(difference) = &verdict {
                        println!("{}\n  {}", case.name, difference.replace('\n', "\n  "));
                    }
                    if let Ok(mut verdicts) = verdicts.lock() {
                        verdicts.insert(case.name.as_str(), verdict);
                    }
                }
            });
        }
    });
    drop((oracle, registry));
    let verdicts = verdicts.into_inner().map_err(|error| error.to_string())?;
    let count = |is: fn(&Verdict) -> bool| verdicts.values().filter(|verdict| is(verdict)).count();
    for (name, verdict) in &verdicts {
        match verdict {
            Verdict::NotComparable(reason) => println!("not comparable: {name}: {reason}"),
            Verdict::Deviation => println!("deviation: {name}"),
            Verdict::BothRefuse(texts) if refusals => println!("both refuse: {name}\n  {}", texts.replace('\n', "\n  ")),
            _ => {}
        }
    }
    let differ = count(|verdict| matches!(verdict, Verdict::Differs(_)));
    println!(
        "{} cases: {} equal, {} both refuse, {} deviations (listed), {} not comparable, {differ} differ ({} s)",
        verdicts.len(),
        count(|verdict| matches!(verdict, Verdict::Equal)),
        count(|verdict| matches!(verdict, Verdict::BothRefuse(_))),
        count(|verdict| matches!(verdict, Verdict::Deviation)),
        count(|verdict| matches!(verdict, Verdict::NotComparable(_))),
        start.elapsed().as_secs(),
    );
    if differ == 0 { Ok(()) } else { Err(format!("{differ} cases differ and are not in docs/reference/deviations.md, or are and do not")) }
}

fn judge(oracle: &Oracle, case: &Case, level: Level, listed: Option<Listed>) -> Verdict {
    if listed == Some(Listed::NotComparable) {
        return Verdict::NotComparable("listed".into());
    }
    let lacks = case.needs.iter().find_map(|need| needs::missing_at(level, *need).map(str::to_owned).or_else(|| need.missing()));
    if let Some(reason) = lacks {
        return Verdict::NotComparable(reason);
    }
    match (oracle.compare(case, level), listed) {
        (Err(error), _) => Verdict::Differs(format!("cannot compare: {error}")),
        (Ok(Outcome::Differs(_)), Some(Listed::Deviation)) => Verdict::Deviation,
        (Ok(Outcome::Differs(differences)), _) => Verdict::Differs(differences.join("\n")),
        (Ok(_), Some(Listed::Deviation)) => Verdict::Differs("is listed in docs/reference/deviations.md, but no longer differs".into()),
        (Ok(Outcome::Equal), _) => Verdict::Equal,
        (Ok(Outcome::BothRefuse { ours, theirs }), _) => Verdict::BothRefuse(format!("ovenbird\n{ours}\ndocker\n{theirs}")),
        (Ok(Outcome::NoImage), _) => Verdict::NotComparable("no image is made".into()),
    }
}
