//! The seeded runner's command line. Exit status 1 means a finding, 2 a wrong argument.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use instar_fuzz::runner::{Budget, run};
use instar_fuzz::{Target, targets};

const USAGE: &str = "usage: instar-fuzz [OPTION]... [TARGET]...

  --seconds N         time for each target (10)
  --inputs N          inputs for each target, instead of a time
  --seed N            what the changes are made from (1)
  --first N           begin with input number N
  --save DIR          where to put an input that made a target panic (.)
  --write-seeds DIR   write the seeds of each target to DIR/TARGET and run nothing
  --replay FILE       run the targets on a file

targets:";

struct Args {
    targets: Vec<Target>,
    budget: Budget,
    seed: u64,
    first: u64,
    save: String,
    write_seeds: Option<String>,
    replay: Option<String>,
}

fn parse(mut words: impl Iterator<Item = String>) -> Option<Args> {
    let mut args = Args {
        targets: Vec::new(),
        budget: Budget::Time(Duration::from_secs(10)),
        seed: 1,
        first: 0,
        save: ".".into(),
        write_seeds: None,
        replay: None,
    };
    while let Some(word) = words.next() {
        let mut number = || words.next()?.parse::<u64>().ok();
        match word.as_str() {
            "--seconds" => args.budget = Budget::Time(Duration::from_secs(number()?)),
            "--inputs" => args.budget = Budget::Inputs(number()?),
            "--seed" => args.seed = number()?,
            "--first" => args.first = number()?,
            "--save" => args.save = words.next()?,
            "--write-seeds" => args.write_seeds = Some(words.next()?),
            "--replay" => args.replay = Some(words.next()?),
            name => args.targets.push(*targets::ALL.iter().find(|target| target.name == name)?),
        }
    }
    if args.targets.is_empty() {
        args.targets = targets::ALL.to_vec();
    }
    Some(args)
}

fn write_seeds(target: &Target, dir: &Path) -> std::io::Result<()> {
    let dir = dir.join(target.name);
    std::fs::create_dir_all(&dir)?;
    for (number, seed) in (target.seeds)().iter().enumerate() {
        std::fs::write(dir.join(format!("seed-{number:02}")), seed)?;
    }
    Ok(())
}

/// Whether the target stood it.
fn fuzz(target: &Target, args: &Args) -> std::io::Result<bool> {
    let Err(crash) = run(target, args.seed, args.first, args.budget).map(|count| {
        println!("{:12} {count} inputs, seed {}: good", target.name, args.seed);
    }) else {
        return Ok(true);
    };
    let path = Path::new(&args.save).join(format!("crash-{}-{}-{}", target.name, args.seed, crash.number));
    std::fs::write(&path, &crash.input)?;
    println!("{:12} PANIC: --seed {} --first {}, input in {}", target.name, args.seed, crash.number, path.display());
    Ok(false)
}

fn run_all(args: &Args) -> std::io::Result<bool> {
    let mut good = true;
    for target in &args.targets {
        if let Some(dir) = &args.write_seeds {
            write_seeds(target, Path::new(dir))?;
        } else if let Some(file) = &args.replay {
            (target.run)(&std::fs::read(file)?);
        } else {
            good &= fuzz(target, args)?;
        }
    }
    Ok(good)
}

fn main() -> ExitCode {
    let Some(args) = parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE} {}", targets::ALL.map(|target| target.name).join(" "));
        return ExitCode::from(2);
    };
    match run_all(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("instar-fuzz: {error}");
            ExitCode::from(2)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_fuzz::mutate;

    #[test]
    fn every_target_stands_its_seeds_and_some_changes() {
        for target in targets::ALL {
            let seeds = (target.seeds)();
            assert!(!seeds.is_empty(), "{} has no seeds", target.name);
            let count = run(&target, 1, 0, Budget::Inputs(seeds.len() as u64 + 200)).unwrap();
            assert_eq!(count, seeds.len() as u64 + 200);
        }
    }

    #[test]
    fn an_input_is_named_by_its_number() {
        let seeds = vec![vec![7; 100], vec![9; 5]];
        assert_eq!(mutate(&seeds, 1, 1), [9; 5]);
        assert_eq!(mutate(&seeds, 1, 77), mutate(&seeds, 1, 77));
        let distinct: std::collections::BTreeSet<_> = (2..200).map(|number| mutate(&seeds, 1, number)).collect();
        assert!(distinct.len() > 100, "{}", distinct.len());
    }

    #[test]
    fn a_panic_is_found_and_told() {
        let target =
            Target { name: "toy", run: |data| assert!(data.len() < 100), seeds: || vec![vec![0; 50], vec![0; 150]] };
        let crash = run(&target, 1, 0, Budget::Inputs(10)).unwrap_err();
        assert_eq!((crash.number, crash.input.len()), (1, 150));
    }
}
