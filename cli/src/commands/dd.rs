//! `dd`.

use instar_guest_protocol::message::Blocks;

use super::convert::{BlockCopy, copy_blocks};
use super::{CommandLine, Settings};
use crate::args::{Key, Opt};
use crate::image_opts::EXCLUSIVE;
use crate::program::{Fail, Outcome, Program};
use crate::size;

/// qemu-img's options, in getopt's order.
const OPTIONS: &[Opt] = &[
    Opt::flag(Key::Help, b'h', "help"),
    Opt::value(Key::Format, b'f', "format"),
    Opt::long_flag(Key::ImageOpts, "image-opts"),
    Opt::value(Key::TargetFormat, b'O', "output-format"),
    Opt::flag(Key::ForceShare, b'U', "force-share"),
    Opt::long_value(Key::Object, "object"),
];

/// Bytes of a block, if nothing else is said.
const BLOCK: u64 = 512;
/// The largest numbers that fit.
const MAX_BLOCK: u64 = i32::MAX as u64;
const MAX_COUNT: u64 = i64::MAX as u64;

/// Runs the command.
///
/// # Errors
/// What the user is told.
pub fn run(program: &Program, mut settings: Settings, args: &[String]) -> Outcome {
    let mut copy = BlockCopy { blocks: Blocks { size: BLOCK, ..Blocks::default() }, ..BlockCopy::default() };
    let line = CommandLine::parse(program, OPTIONS, &[], args);
    let operands = line.walk(&mut settings, include_str!("help/dd.txt"), |key, value| {
        match key {
            Key::Format => copy.format = Some(value),
            Key::ImageOpts => copy.image_opts = true,
            Key::TargetFormat => copy.target_format = Some(value),
            Key::ForceShare => copy.force_share = true,
            _ => {}
        }
        Ok(())
    })?;
    let Some(operands) = operands else { return Ok(()) };
    let (mut source, mut target) = (None, None);
    for operand in &operands {
        take_operand(operand, &mut copy.blocks, &mut source, &mut target)?;
    }
    let (Some(source), Some(target)) = (source, target) else {
        return Err("Must specify both input and output files".into());
    };
    if copy.image_opts && copy.format.is_some() {
        return Err(EXCLUSIVE.into());
    }
    copy_blocks(program, &settings, BlockCopy { source, target, ..copy })
}

fn take_operand(
    operand: &str,
    blocks: &mut Blocks,
    source: &mut Option<String>,
    target: &mut Option<String>,
) -> Result<(), Fail> {
    let (name, value) = operand.split_once('=').unwrap_or((operand, ""));
    let is_assignment = name.len() < operand.len();
    match name {
        "if" if is_assignment => *source = Some(value.to_owned()),
        "of" if is_assignment => *target = Some(value.to_owned()),
        "bs" if is_assignment => blocks.size = size::parse_named("bs", value, 1, MAX_BLOCK)?,
        "count" if is_assignment => blocks.count = Some(size::parse_count("count", value, 0, MAX_COUNT)?),
        "skip" if is_assignment => blocks.skip = size::parse_count("skip", value, 0, MAX_COUNT)?,
        _ => return Err(format!("unrecognized operand {name}").into()),
    }
    Ok(())
}
