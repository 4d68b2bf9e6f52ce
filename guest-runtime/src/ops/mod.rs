//! The operations. Each runs on any [`Platform`]: in the virtual machine, and on the host in tests.
//!
//! A guest program calls one of [`serve_info`], [`serve_convert`], [`serve_create`] and [`serve_edit`], so that it contains only the code of that operation.

pub mod amend;
pub mod bench;
pub mod bitmap;
pub mod commit;
pub mod convert;
pub mod create;
mod edit;
pub mod failure;
pub mod info;
pub mod query;
pub mod rebase;
pub mod resize;
pub mod snapshot;

use instar_guest_protocol::message::request::Operation;
use instar_guest_protocol::message::{Call, Cause, Failure, Reply, Request, Step, call, reply};
use prost::Message;

use self::failure::failure;
use crate::platform::Platform;

/// Serves an `info` request and delivers the reply.
pub fn serve_info<P: Platform>(platform: &P, request: &[u8]) {
    serve(platform, request, |operation| match operation {
        Operation::Info(request) => Some(info::run(platform, &request).map(reply::Result::Info)),
        _ => None,
    });
}

/// Serves a `convert` request and delivers the reply.
pub fn serve_convert<P: Platform>(platform: &P, request: &[u8]) {
    serve(platform, request, |operation| match operation {
        Operation::Convert(request) => Some(convert::run(platform, &request).map(reply::Result::Convert)),
        _ => None,
    });
}

/// Serves a `create` request and delivers the reply.
pub fn serve_create<P: Platform>(platform: &P, request: &[u8]) {
    serve(platform, request, |operation| match operation {
        Operation::Create(request) => Some(create::run(platform, &request).map(reply::Result::Create)),
        _ => None,
    });
}

/// Serves a request to change an image in place and delivers the reply.
pub fn serve_edit<P: Platform>(platform: &P, request: &[u8]) {
    serve(platform, request, |operation| {
        let done = match operation {
            Operation::Snapshot(request) => snapshot::run(platform, &request),
            Operation::Bitmap(request) => bitmap::run(platform, &request),
            Operation::Amend(request) => amend::run(platform, &request),
            Operation::Resize(request) => resize::run(platform, &request),
            Operation::Rebase(request) => rebase::run(platform, &request),
            Operation::Commit(request) => commit::run(platform, &request),
            Operation::Bench(request) => bench::run(platform, &request),
            _ => return None,
        };
        Some(done.map(reply::Result::Edit))
    });
}

/// Serves a question about images and delivers the reply.
pub fn serve_query<P: Platform>(platform: &P, request: &[u8]) {
    serve(platform, request, |operation| {
        Some(match operation {
            Operation::Map(request) => query::map::run(platform, &request).map(reply::Result::Map),
            Operation::Compare(request) => query::compare::run(platform, &request).map(reply::Result::Compare),
            Operation::Check(request) => query::check::run(platform, &request).map(reply::Result::Check),
            Operation::Measure(request) => query::measure::run(platform, &request).map(reply::Result::Measure),
            _ => return None,
        })
    });
}

/// Decodes, runs, replies. A request for another operation is a bad one.
fn serve<P: Platform>(
    platform: &P,
    request: &[u8],
    run: impl FnOnce(Operation) -> Option<Result<reply::Result, Failure>>,
) {
    let operation = Request::decode(request).ok().and_then(|request| request.operation);
    let result = operation.and_then(run).unwrap_or_else(|| Err(failure(Step::Open, Cause::BadRequest)));
    let reply = Reply { result: Some(result.unwrap_or_else(reply::Result::Failure)) };
    platform.call(&Call { kind: Some(call::Kind::Done(reply)) });
}
