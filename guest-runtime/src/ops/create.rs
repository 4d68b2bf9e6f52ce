//! `create`: an empty image.

use instar_guest_protocol::message::{Cause, CreateReply, CreateRequest, Failure, Source, Step};

use crate::formats::{create_image, open_named};
use crate::ops::failure::failure;
use crate::platform::Platform;

/// Creates as the request says.
///
/// # Errors
/// What the host makes its message of.
pub fn run<P: Platform>(platform: &P, request: &CreateRequest) -> Result<CreateReply, Failure> {
    let backing = request.target.backing.as_ref().and_then(|backing| backing.image.as_ref());
    // Opened even if the size is given: a backing image that can't be read must not be recorded.
    let backing_size = match backing {
        Some(image) => Some(size_of(platform, image)?),
        None => None,
    };
    let size = request.size.or(backing_size).ok_or_else(|| failure(Step::Create, Cause::BadRequest))?;
    let created = |failure: Failure| Failure { step: Step::Create.into(), ..failure };
    create_image(platform, &request.target, size, false)?.finish(platform).map_err(created)?;
    Ok(CreateReply { virtual_size: size })
}

/// The size of an image that is to lie below another, for which an encrypted one needs no key.
fn size_of<P: Platform>(platform: &P, source: &Source) -> Result<u64, Failure> {
    let mut image = open_named(platform, source)?;
    match image.open_parts(platform) {
        Err(failure) if failure.cause() != Cause::Encrypted => Err(failure),
        _ => Ok(image.into_layer().size()),
    }
}
