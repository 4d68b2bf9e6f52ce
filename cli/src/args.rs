//! GNU `getopt_long`, with its exact grammar and messages: permutation, abbreviated long options, glued arguments, `--`.

/// An option of a command.
#[derive(Clone, Copy, Debug)]
pub struct Opt {
    /// What it means; two spellings with the same key are the same option.
    pub key: Key,
    /// One-letter spelling.
    pub short: Option<u8>,
    /// Long spelling, without the dashes.
    pub long: Option<&'static str>,
    /// Takes an argument.
    pub argument: Argument,
    /// The long spelling may be abbreviated.
    pub abbreviable: bool,
}

/// Does an option take an argument?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    /// It takes none.
    None,
    /// It needs one.
    Required,
    /// It takes one behind an equals sign.
    Optional,
}

/// The meaning of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Key {
    Help,
    Version,
    Verbose,
    Trace,
    Quiet,
    Progress,
    Format,
    TargetFormat,
    Options,
    Backing,
    BackingFormat,
    BackingUnsafe,
    BackingChain,
    ForceShare,
    Output,
    Repair,
    Size,
    Strict,
    SecondFormat,
    MaxLength,
    StartOffset,
    Object,
    ImageOpts,
    TargetImageOpts,
    Snapshot,
    SourceCache,
    TargetCache,
    SparseSize,
    Compress,
    NoCreate,
    TargetIsZero,
    Bitmaps,
    SkipBrokenBitmaps,
    Rate,
    Parallel,
    OutOfOrder,
    CopyRange,
    Salvage,
    AllowDir,
    MaxGuestMemory,
    Threads,
    Timeout,
    DebugGuest,
    PassphraseFile,
    MaxKeyIterations,
    IgnoreQuirks,
    UnsafeQuirks,
    RequireKnownRaw,
    QemuVersion,
    Stats,
    ProgressForm,
    Chain,
    Safety,
    List,
    CreateSnapshot,
    ApplySnapshot,
    DeleteSnapshot,
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge,
    Granularity,
    SourceFile,
    SourceFormat,
    Force,
    Shrink,
    Preallocation,
    Drop,
    Base,
    Count,
    Depth,
    Offset,
    BufferSize,
    StepSize,
    Aio,
    Native,
    Write,
    Pattern,
    FlushInterval,
    NoDrain,
}

impl Opt {
    const fn new(key: Key, short: Option<u8>, long: Option<&'static str>, argument: Argument) -> Self {
        Self { key, short, long, argument, abbreviable: true }
    }

    /// `-x`, `--long`.
    pub const fn flag(key: Key, short: u8, long: &'static str) -> Self {
        Self::new(key, Some(short), Some(long), Argument::None)
    }

    /// `-x ARG`, `--long ARG`.
    pub const fn value(key: Key, short: u8, long: &'static str) -> Self {
        Self::new(key, Some(short), Some(long), Argument::Required)
    }

    /// `--long`.
    pub const fn long_flag(key: Key, long: &'static str) -> Self {
        Self::new(key, None, Some(long), Argument::None)
    }

    /// `--long ARG`.
    pub const fn long_value(key: Key, long: &'static str) -> Self {
        Self::new(key, None, Some(long), Argument::Required)
    }

    /// `--long`, `--long=ARG`.
    pub const fn long_optional(key: Key, long: &'static str) -> Self {
        Self::new(key, None, Some(long), Argument::Optional)
    }

    /// `-x`.
    pub const fn short_flag(key: Key, short: u8) -> Self {
        Self::new(key, Some(short), None, Argument::None)
    }

    /// An option that qemu-img does not have: it must be spelled out, so that it makes no abbreviation ambiguous.
    pub const fn spelled_out(self) -> Self {
        Self { abbreviable: false, ..self }
    }
}

/// What stands on the command line, in the order of getopt: an option with its argument.
pub type Found = (Key, Option<String>);

/// A parsed command line.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// Options in order.
    pub options: Vec<Found>,
    /// Everything else, in order.
    pub operands: Vec<String>,
    /// What getopt complains about; parsing ended there.
    pub error: Option<String>,
}

/// Where parsing ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operands {
    /// Options may follow operands.
    Anywhere,
    /// The first operand ends the options.
    EndOptions,
    /// Options may follow operands; a negative number right behind the first operand is another one.
    WithNumber,
}

/// Parses `args` by `table`. The complaint in [`Parsed::error`] comes after the options that precede it, so that a
/// caller can act on those first, as a getopt loop does.
pub fn parse(table: &[Opt], args: &[String], operands: Operands) -> Parsed {
    let mut parsed = Parsed::default();
    let mut rest = args.iter().peekable();
    while let Some(arg) = rest.next() {
        let step = match arg.as_str() {
            "--" => {
                parsed.operands.extend(rest.cloned());
                break;
            }
            long if long.starts_with("--") => parse_long(table, &long[2..], &mut rest).map(|found| vec![found]),
            short if short.starts_with('-') && short.len() > 1 => parse_short(table, &short[1..], &mut rest),
            operand => {
                parsed.operands.push(operand.to_owned());
                if operands == Operands::EndOptions {
                    parsed.operands.extend(rest.cloned());
                    break;
                }
                if operands == Operands::WithNumber && parsed.operands.len() == 1 {
                    parsed.operands.extend(rest.next_if(|next| is_negative(next)).cloned());
                }
                continue;
            }
        };
        match step {
            Ok(found) => parsed.options.extend(found),
            Err((before, complaint)) => {
                parsed.options.extend(before);
                parsed.error = Some(complaint);
                break;
            }
        }
    }
    parsed
}

/// `-5`, `-1M`.
fn is_negative(text: &str) -> bool {
    text.strip_prefix('-').is_some_and(|number| number.starts_with(|first: char| first.is_ascii_digit()))
}

type Step<T> = Result<T, (Vec<Found>, String)>;

fn parse_long<'a>(table: &[Opt], text: &str, rest: &mut impl Iterator<Item = &'a String>) -> Step<Found> {
    let (name, glued) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    };
    let fail = |complaint: String| Err((Vec::new(), complaint));
    let opt = match find_long(table, name, glued.is_some()) {
        LongMatch::One(opt) => opt,
        LongMatch::None => return fail(format!("unrecognized option '--{text}'")),
        LongMatch::Several(names) => {
            let names: Vec<String> = names.iter().map(|name| format!("'--{name}'")).collect();
            return fail(format!("option '--{text}' is ambiguous; possibilities: {}", names.join(" ")));
        }
    };
    let long = opt.long.unwrap_or_default();
    match (opt.argument, glued) {
        (Argument::None, Some(_)) => fail(format!("option '--{long}' doesn't allow an argument")),
        (Argument::None | Argument::Optional, None) => Ok((opt.key, None)),
        (Argument::Required | Argument::Optional, Some(value)) => Ok((opt.key, Some(value.to_owned()))),
        (Argument::Required, None) => match rest.next() {
            Some(value) => Ok((opt.key, Some(value.clone()))),
            None => fail(format!("option '--{long}' requires an argument")),
        },
    }
}

enum LongMatch<'t> {
    None,
    One(&'t Opt),
    Several(Vec<&'static str>),
}

/// `glued`: an argument is there. Where two options have the name, it goes to the one that takes it.
fn find_long<'t>(table: &'t [Opt], name: &str, glued: bool) -> LongMatch<'t> {
    let with_long = || table.iter().filter_map(|opt| opt.long.map(|long| (opt, long)));
    let mut exact = with_long().filter(|(_, long)| *long == name).map(|(opt, _)| opt);
    if let Some(first) = exact.next() {
        let takes = |opt: &&Opt| opt.argument != Argument::None;
        return LongMatch::One(if glued && !takes(&first) { exact.find(takes).unwrap_or(first) } else { first });
    }
    let candidates: Vec<(&Opt, &'static str)> =
        with_long().filter(|(opt, long)| opt.abbreviable && long.starts_with(name)).collect();
    match candidates.as_slice() {
        [] => LongMatch::None,
        [(first, _), others @ ..] if others.iter().all(|(other, _)| other.key == first.key) => LongMatch::One(first),
        several => LongMatch::Several(several.iter().map(|(_, long)| *long).collect()),
    }
}

fn parse_short<'a>(table: &[Opt], cluster: &str, rest: &mut impl Iterator<Item = &'a String>) -> Step<Vec<Found>> {
    let mut found = Vec::new();
    for (at, letter) in cluster.char_indices() {
        let opt = table.iter().find(|opt| opt.short.is_some_and(|short| char::from(short) == letter));
        match opt {
            None => return Err((found, format!("invalid option -- '{letter}'"))),
            Some(opt) if opt.argument == Argument::None => found.push((opt.key, None)),
            Some(opt) => {
                let glued = &cluster[at + letter.len_utf8()..];
                let value = match glued.is_empty() {
                    false => glued.to_owned(),
                    true => match rest.next() {
                        Some(value) => value.clone(),
                        None => return Err((found, format!("option requires an argument -- '{letter}'"))),
                    },
                };
                found.push((opt.key, Some(value)));
                break;
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[Opt] = &[
        Opt::flag(Key::Help, b'h', "help"),
        Opt::value(Key::Format, b'f', "format"),
        Opt::long_value(Key::Output, "output"),
        Opt::flag(Key::BackingChain, b'b', "backing-chain"),
        Opt::long_value(Key::Object, "object"),
        Opt::long_flag(Key::ImageOpts, "image-opts"),
        Opt::flag(Key::ForceShare, b'U', "force-share"),
        Opt::long_flag(Key::Safety, "outer-safety").spelled_out(),
    ];

    fn run(args: &[&str]) -> Parsed {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        parse(TABLE, &args, Operands::Anywhere)
    }

    fn complaint(args: &[&str]) -> String {
        run(args).error.expect("a complaint")
    }

    #[test]
    fn permutes_and_abbreviates() {
        let parsed = run(&["a", "--out=json", "-f", "raw", "b", "--", "-c"]);
        assert_eq!(parsed.options, [(Key::Output, Some("json".to_owned())), (Key::Format, Some("raw".to_owned()))]);
        assert_eq!(parsed.operands, ["a", "b", "-c"]);
        assert_eq!(parsed.error, None);
    }

    #[test]
    fn clusters_short_options() {
        let parsed = run(&["-bUfqcow2", "-"]);
        assert_eq!(
            parsed.options,
            [(Key::BackingChain, None), (Key::ForceShare, None), (Key::Format, Some("qcow2".to_owned()))]
        );
        assert_eq!(parsed.operands, ["-"]);
    }

    #[test]
    fn complaints_are_those_of_getopt() {
        assert_eq!(complaint(&["--nonsense"]), "unrecognized option '--nonsense'");
        assert_eq!(complaint(&["--nonsense=3"]), "unrecognized option '--nonsense=3'");
        assert_eq!(complaint(&["-x"]), "invalid option -- 'x'");
        assert_eq!(complaint(&["-f"]), "option requires an argument -- 'f'");
        assert_eq!(complaint(&["--output"]), "option '--output' requires an argument");
        assert_eq!(complaint(&["--back=3"]), "option '--backing-chain' doesn't allow an argument");
        assert_eq!(complaint(&["--fo"]), "option '--fo' is ambiguous; possibilities: '--format' '--force-share'");
        assert_eq!(complaint(&["--o=x"]), "option '--o=x' is ambiguous; possibilities: '--output' '--object'");
    }

    #[test]
    fn own_options_make_nothing_ambiguous() {
        assert_eq!(run(&["--out", "json"]).options, [(Key::Output, Some("json".to_owned()))]);
        assert_eq!(run(&["--outer-safety"]).options, [(Key::Safety, None)]);
        assert_eq!(complaint(&["--oute"]), "unrecognized option '--oute'");
    }

    #[test]
    fn a_name_may_be_shared_by_a_flag_and_an_optional_argument() {
        let table = [Opt::flag(Key::Progress, b'p', "progress"), Opt::long_optional(Key::ProgressForm, "progress")];
        let found = |arg: &str| parse(&table, &[arg.to_owned()], Operands::Anywhere).options;
        assert_eq!(found("--progress"), [(Key::Progress, None)]);
        assert_eq!(found("--progress=bar"), [(Key::ProgressForm, Some("bar".to_owned()))]);
        let found = |arg: &str| parse(&table[1..], &[arg.to_owned()], Operands::Anywhere).options;
        assert_eq!(found("--progress"), [(Key::ProgressForm, None)]);
    }

    #[test]
    fn options_before_a_complaint_are_kept() {
        let parsed = run(&["-hx"]);
        assert_eq!(parsed.options, [(Key::Help, None)]);
        assert!(parsed.error.is_some());
    }

    #[test]
    fn a_negative_number_may_follow_the_first_operand() {
        let run = |args: &[&str]| {
            let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
            parse(TABLE, &args, Operands::WithNumber)
        };
        let parsed = run(&["-b", "a", "-1M", "-U"]);
        assert_eq!((parsed.options.len(), parsed.error), (2, None));
        assert_eq!(parsed.operands, ["a", "-1M"]);
        assert_eq!(run(&["-b", "-1M", "a"]).error.unwrap(), "invalid option -- '1'");
        assert_eq!(run(&["a", "b", "-1M"]).error.unwrap(), "invalid option -- '1'");
        assert_eq!(run(&["a", "-U", "-1M"]).error.unwrap(), "invalid option -- '1'");
        assert_eq!(run(&["a", "--", "-1M"]).operands, ["a", "-1M"]);
    }

    #[test]
    fn first_operand_may_end_the_options() {
        let args: Vec<String> = ["-h", "info", "-x"].map(str::to_owned).to_vec();
        let parsed = parse(TABLE, &args, Operands::EndOptions);
        assert_eq!(parsed.operands, ["info", "-x"]);
        assert_eq!(parsed.error, None);
    }
}
